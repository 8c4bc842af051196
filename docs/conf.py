"""The documentation site: `make docs` builds it in build/docs, without a network.

The pages are the files of this folder and the READMEs that stand beside the code: the repository is
the source folder, so that a link works on the site as it does in the repository.
"""

import sys
from pathlib import Path
from typing import Any

from pygments.lexers import JsonLexer

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

project = "SAM2VideoX"
html_title = "SAM2VideoX"
root_doc = "docs/index"
smartquotes = False  # they would make an en dash of --option
highlight_language = "none"
default_role = "literal"  # `name` in docstrings
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated_pages"]

include_patterns = [
    "docs/**.md",
    "CONTRIBUTING.md",
    "cache_schema/README.md",
    "stages/*/README.md",
    "tests/benchmarks/*.md",
    "tests/benchmarks/evidence/*.md",
]
# Other folders are not walked: a checkout also has environments, clips and runs.
_PARTS = ("docs", "cache_schema", "stages", "tests", "CONTRIBUTING.md")
exclude_patterns = [
    *(path.name for path in ROOT.iterdir() if path.name not in _PARTS),
    "**/__pycache__",
    "tests/[!b]*",
]

myst_heading_anchors = 3
suppress_warnings = ["myst.xref_ambiguous"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
# Slow to import, and nothing that is shown needs them.
autodoc_mock_imports = ["accelerate", "deepspeed", "diffusers", "peft", "transformers"]
napoleon_use_rtype = False

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_extra_path = ["_root"]


def setup(app: Any) -> None:
    """Register the language of JSON blocks with comments."""
    app.add_lexer("jsonc", JsonLexer)
