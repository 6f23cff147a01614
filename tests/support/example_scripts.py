"""The scripts of examples/ as modules."""

import importlib.util

from conftest import ROOT


def load_example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / f"examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
