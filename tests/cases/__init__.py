"""What is to be tested of each operator and router; `test_ops.py` and `test_routers.py` test it.

A file in ``ops/`` or ``routers/`` has a list ``CASES``; there is nothing else to edit.
"""

import importlib
import pkgutil


def collect(package):
    """The cases of all files of a package, in order of their names."""
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    return [case for module in modules for case in module.CASES]
