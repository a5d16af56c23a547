"""The documentation site builds without a warning, and what its pages show exists and works."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip('sphinx')
pytest.importorskip('myst_parser')
pytest.importorskip('furo')

ROOT = Path(__file__).parents[1]


class _Page(HTMLParser):
    """Links, images and scripts of a page, and the ids in it."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag, attrs) -> None:
        attrs = dict(attrs)
        if 'id' in attrs:
            self.ids.add(attrs['id'])
        if tag == 'a' and 'href' in attrs:
            self.targets.append(attrs['href'])
        # What a browser fetches to show the page.
        elif tag in ('link', 'img', 'script', 'iframe'):
            self.loaded += [attrs[key] for key in ('src', 'href') if key in attrs]


def read(path: Path) -> _Page:
    page = _Page()
    page.feed(path.read_text())
    return page


@pytest.fixture(scope='module')
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('site')
    recipe = (ROOT / 'Makefile').read_text()
    command = re.search(r'\$\(RUN\) -m (sphinx .*) -d build/doctrees \. build/docs', recipe)
    command = [sys.executable, '-m', *command.group(1).split(), '-d', str(out / 'doctrees')]
    result = subprocess.run(
        [*command, '.', str(out / 'site')], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return out / 'site'


@pytest.mark.slow
def test_links_and_images_of_the_site_lead_somewhere(site):
    pages = {path: read(path) for path in site.rglob('*.html') if '_modules' not in path.parts}
    assert len(pages) > 10
    broken = []
    for path, page in pages.items():
        for target in page.targets + page.loaded:
            name, _, anchor = target.partition('#')
            if re.match(r'[a-z]+:', target) or target == '#':
                continue
            other = (path.parent / name.partition('?')[0]).resolve() if name else path
            ids = read(other).ids if anchor and other.suffix == '.html' else {anchor}
            if not other.exists() or anchor not in ids:
                broken.append(f'{path.relative_to(site)}: {target}')
    assert not broken


@pytest.mark.slow
def test_the_site_needs_no_network(site):
    for path in site.rglob('*.html'):
        assert not [link for link in read(path).loaded if re.match(r'(https?:)?//', link)], path
    for path in site.rglob('*.css'):
        assert not re.search(r'(url\(|@import )["\']?(https?:)?//', path.read_text()), path


@pytest.mark.slow
def test_every_public_name_is_in_the_api_page(site):
    from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS

    import ssn_plugin

    ids = read(site / 'docs' / 'api.html').ids
    documented = {name.rsplit('.', 1)[-1] for name in ids}
    assert set(ssn_plugin.__all__) - {'__version__'} <= documented
    for registry in (HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS):
        own = {
            value.__name__
            for value in registry.module_dict.values()
            if value.__module__.startswith('ssn_plugin.')
        }
        assert own
        assert own <= documented


def test_triangle_is_drawn(tmp_path):
    out = tmp_path / 'triangle.png'
    script = ROOT / 'docs' / 'draw_triangle.py'
    subprocess.run([sys.executable, script, out], check=True, capture_output=True, cwd=ROOT)
    assert out.read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'


def test_formulas(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / 'docs' / 'extensions')
    from mathml import to_mathml

    shown = re.sub(r' \w+="[^"]*"|\s+|</?mrow>', '', to_mathml(r"p'_k + \lVert z \rVert_2"))
    # The prime stands before the index, and the norm has its index as a whole.
    assert '<msub><mi>p</mi><mo>&#8242;</mo><mi>k</mi></msub>' in shown
    assert '<msub><mo>‖</mo><mi>z</mi><mo>‖</mo><mn>2</mn></msub>' in shown
