"""How Sphinx builds the documentation: ``make docs`` writes it to build/docs.

The source folder is the root of the repository, not this folder, so that the pages link to READMEs,
configs and scripts by the same relative paths on the site and in a clone.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'docs' / 'extensions')]

from ssn_plugin import __version__  # noqa: E402  (found by the line above)

project = 'ssn_plugin'
author = 'The ssn_plugin authors'
project_copyright = author
version = release = __version__

extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx.ext.viewcode',
    # of the folder extensions/:
    'mathml',
    'registered',
]
root_doc = 'docs/index'
include_patterns = [
    'README.md',
    'CONTRIBUTING.md',
    'CHANGELOG.md',
    'docs/**.md',
    'configs/**.md',
    'benchmarks/**.md',
    'studies/**.md',
    'ssn_plugin/**.md',
]
exclude_patterns = ['.*', 'build', 'dist', 'data', 'work_dirs', 'checkpoints', 'ssn_plugin/.mim']

myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3

autodoc_member_order = 'bysource'
autodoc_typehints = 'none'  # the signature shows them
python_use_unqualified_type_names = True
add_module_names = False
napoleon_custom_sections = ['Source']

html_theme = 'furo'
html_title = f'ssn_plugin {version}'
html_show_sourcelink = False
html_static_path = ['static']
html_css_files = ['site.css']
html_extra_path = ['redirect']  # from the root of the site to its first page
