"""``python -m gradstore``."""

from importlib import import_module

if __name__ == "__main__":
    import_module("gradstore.cli.main").main()
