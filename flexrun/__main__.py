"""Makes ``python -m flexrun`` the same as ``flexrun``."""

from flexrun.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
