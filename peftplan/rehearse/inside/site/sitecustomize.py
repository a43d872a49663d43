"""Python runs this when it starts: in a rehearsal it watches the program, then the `sitecustomize` that was there before runs."""

import os
import sys
from importlib.machinery import PathFinder

_HERE = os.path.dirname(os.path.abspath(__file__))

if "PEFTPLAN_REHEARSAL" in os.environ:
    from peftplan.rehearse.inside import begin

    begin()

_other = PathFinder.find_spec("sitecustomize", [path for path in sys.path if os.path.abspath(path) != _HERE])
if _other is not None and _other.loader is not None:
    _other.loader.exec_module(sys.modules[__name__])
