"""`python -m dspex` and the `dspex` script."""

from __future__ import annotations

from dspex.console.main import main

if __name__ == "__main__":
    main()
