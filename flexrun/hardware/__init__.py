"""Machines as numbers: measured, fitted, saved, or read from a data sheet."""

from flexrun.hardware.hardware import Hardware, LinearWork, Processor, Rates, Transfer

__all__ = ["Hardware", "LinearWork", "Processor", "Rates", "Transfer"]
