"""report.html: its content, that it needs nothing else, and how a browser lays it out."""

import html.parser
import os
import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training_folder import rows, work_dir

from ssn_plugin.analysis.history import HISTORY_FILE, append_to_history, start_history
from ssn_plugin.analysis.run_report import REPORT_FILE
from ssn_plugin.errors import InputError
from ssn_plugin.jobs.report import write_report

BROWSER = next(filter(None, map(shutil.which, ('chromium', 'google-chrome', 'chrome'))), None)


class Elements(html.parser.HTMLParser):
    """Notes tags with their attributes, and whether they nest."""

    VOID = frozenset({'meta', 'link', 'br', 'img', 'hr', 'input'})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found, self.open, self.text = [], [], ''
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    return write_report(work_dir(tmp_path_factory.mktemp('report') / 'run')).read_text()


def test_what_the_page_says(report):
    page = Elements(report)
    words = ' '.join(page.text.split())
    for said in (
        'a_config',
        'run · at iteration 10 of 20 · started 2026-01-02 03:04',
        '0 of 53',
        'mIoU, iteration 5',
        '61.5',
        'SSN, eps 0.125',
        '0 to 1, from 0 to 0.5 of the run',
        'from iteration 9 of 20',
        '2.99.9',
        'IN 0 LN 25 BN 75',
        'backbone.layer1.1.sn1',
        'Paths in the simplex',
        'alert("not run")',
    ):
        assert said in words, said
    assert report.count('<svg') == 5
    assert sum(tag == 'tr' for tag, _ in page.found) == 54


def test_the_page_needs_nothing_else(report):
    page = Elements(report)
    assert not {'script', 'link', 'iframe', 'img', 'object', 'base'} & {
        tag for tag, _ in page.found
    }
    for _, attributes in page.found:
        for name in ('src', 'href', 'xlink:href', 'action'):
            assert attributes.get(name, '#').startswith('#')
    assert not re.search(r'@import|url\((?!#)', report)


def test_ids_are_unique_and_references_lead_somewhere(report):
    ids = [attributes['id'] for _, attributes in Elements(report).found if 'id' in attributes]
    assert len(ids) == len(set(ids)) > 100
    wanted = re.findall(r'url\(#([^)]+)\)', report) + re.findall(r'href="#([^"]+)"', report)
    assert wanted
    assert set(wanted) <= set(ids)


def test_pictures_have_names_for_those_who_do_not_see_them(report):
    svgs = [attributes for tag, attributes in Elements(report).found if tag == 'svg']
    labels = [attributes['aria-label'] for attributes in svgs]
    assert labels[0] == 'What each layer chose'
    assert len(set(labels)) == 5
    assert {attributes['role'] for attributes in svgs} == {'img'}


def browse(page: Path, *arguments: str) -> str:
    command = [BROWSER, '--headless', '--no-sandbox', '--disable-gpu', '--hide-scrollbars']
    command += ['--virtual-time-budget=3000', '--host-resolver-rules=MAP * ~NOTFOUND']
    command += [f'--user-data-dir={page.parent / "profile"}', *arguments, page.as_uri()]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {'HOME': str(page.parent)},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason='no chromium or chrome on PATH')
@pytest.mark.parametrize(('layers', 'width'), [(53, 1280), (53, 390), (104, 390)])
def test_in_a_browser(tmp_path, layers, width):
    report = write_report(work_dir(tmp_path / 'run', layers)).read_text()
    # A frame has the width that is asked for, a window of the browser has a least width.
    page = tmp_path / 'page.html'
    page.write_text(
        f'<body style="margin:0"><iframe style="border:0;width:{width}px;height:1600px" '
        f'srcdoc="{escape(report)}"></iframe><script>onload = () => {{'
        'const page = document.querySelector("iframe").contentDocument;'
        'const root = page.documentElement, own = root.clientWidth;'
        'const out = [...page.querySelectorAll("main, h1, h2, p, dl, .card, .scroll, figcaption")]'
        '.filter(e => e.getBoundingClientRect().right > own + 0.5).map(e => e.tagName);'
        'const tall = Math.max(...[...page.querySelectorAll("svg")].map(e => e.clientWidth));'
        'document.body.dataset.seen = [own, root.scrollWidth, out.length, tall].join(" ");'
        '}</script></body>'
    )
    seen = re.search(r'data-seen="([^"]+)"', browse(page, '--dump-dom'))[1]
    own, scrolls, outside, widest = map(int, seen.split())
    assert own <= width
    assert scrolls == own  # nothing is wider than the page
    assert outside == 0
    assert widest >= 600  # figures are not squeezed: they scroll in their own boxes
    browse(page, f'--window-size={max(width, 500)},1600', f'--screenshot={tmp_path / "shot.png"}')
    picture = np.asarray(Image.open(tmp_path / 'shot.png').convert('RGB'))[:, :width].astype(int)
    for colour in ((86, 180, 233), (0, 158, 115)):  # LN and BN; the ratios of IN are zero here
        share = (abs(picture - np.array(colour)).max(-1) < 12).mean()
        assert share > 0.003


def test_a_run_that_has_ended_and_its_file(tmp_path):
    folder = work_dir(tmp_path / 'run', 4)
    append_to_history(folder / HISTORY_FILE, 20, rows(4), 1.0, None)
    written = write_report(folder, tmp_path / 'elsewhere.html')
    assert written == tmp_path / 'elsewhere.html'
    assert 'ended after 20 iterations' in written.read_text()
    assert not (folder / REPORT_FILE).exists()


@pytest.mark.parametrize(
    ('resumed', 'said'), [(1, 'resumed once, '), (2, 'resumed 2 times, last ')]
)
def test_how_often_it_was_resumed(tmp_path, resumed, said):
    folder = work_dir(tmp_path / 'run', 4)
    for number in range(1, resumed + 1):
        logs = folder / f'20260102_03040{5 + number}' / 'vis_data'
        logs.mkdir(parents=True)
        step = 5 + number
        (logs / 'scalars.json').write_text(f'{{"lr": 0.1, "loss": 2.5, "step": {step}}}\n')
    assert f'{said}2026-01-02 03:04' in write_report(folder).read_text()


def test_a_history_alone_is_enough(tmp_path):
    folder = work_dir(tmp_path / 'run', 2)
    shutil.rmtree(folder / '20260102_030405')
    (folder / 'a_config.py').unlink()
    text = write_report(folder).read_text()
    assert text.count('<svg') == 4
    Elements(text)


def test_a_config_that_cannot_be_read_is_shown(tmp_path):
    folder = work_dir(tmp_path / 'run', 2)
    (folder / 'a_config.py').write_text('model = dict(function=<function f at 0x7f>)\n')
    page = Elements(write_report(folder).read_text())
    assert 'dict(function=<function f at 0x7f>)' in page.text


@pytest.mark.parametrize(
    ('prepare', 'said'),
    [
        (lambda folder: None, 'work_dir: no such folder'),
        (lambda folder: folder.mkdir(), 'has no ratios.jsonl, and .* has no last_checkpoint'),
        (lambda folder: start_history(_made(folder) / HISTORY_FILE, rows(1), {}), 'no record yet'),
    ],
)
def test_folders_that_tell_nothing(tmp_path, prepare, said):
    prepare(tmp_path / 'run')
    with pytest.raises(InputError, match=said) as raised:
        write_report(tmp_path / 'run')
    assert '\n' not in str(raised.value)
    assert not (tmp_path / 'run' / REPORT_FILE).exists()


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
