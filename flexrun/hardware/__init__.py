"""Machines as numbers: measured, fitted, saved, or read from a data sheet."""

from flexrun.hardware.hardware import LANES, Hardware
from flexrun.hardware.rates import CompressedRates, LinearWork, Processor, Rates, Transfer

__all__ = ["LANES", "CompressedRates", "Hardware", "LinearWork", "Processor", "Rates", "Transfer"]
