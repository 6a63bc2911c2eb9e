"""Sphinx configuration of the HTML book; book/build.py gathers its pages and runs it."""

project = "Deformable DETR"
html_title = "Deformable DETR: a textbook that runs"
language = "en"

extensions = ["myst_nb", "sphinxcontrib.bibtex", "sphinx-mathjax-offline"]
root_doc = "index"
templates_path = []

# the chapters come executed, and are not run a second time
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}  # no chapter has widgets, and their scripts would come from another host

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_dmath_double_inline = True
myst_heading_anchors = 3

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "plain"
bibtex_reference_style = "author_year"

html_theme = "sphinx_book_theme"
html_static_path = ["book.css"]
html_css_files = ["book.css"]
html_theme_options = {
    "show_navbar_depth": 2,
    "use_download_button": True,  # the notebook itself
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the search field is in the sidebar
    "footer_content_items": [],
}
html_context = {"default_mode": "auto"}  # light or dark as the reader's system
html_show_copyright = False
html_show_sphinx = False
