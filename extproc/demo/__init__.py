"""`extproc demo` and `extproc run`: a simulated fleet, extproc and the real Envoy, from one file.

settings.py   the file, and what follows from it        children.py   processes that end when their block does
stack.py      the processes of this demo, made ready    compare.py    the load on both, and the table
"""

from extproc.demo.children import DemoError
from extproc.demo.compare import run_demo
from extproc.demo.stack import run_stack

__all__ = ["DemoError", "run_demo", "run_stack"]
