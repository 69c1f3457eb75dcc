"""Make the tables of models and tools in docs/compatibility.md again, with the packages that are installed.

python tests/peers/make_page.py

It needs all packages of the extra `peers`, and takes some minutes. run.py makes the third table.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import model_families
    import model_tools

    model_families.write()
    model_tools.write()
