"""Package metadata, extras, and the .mim folder that OpenMMLab's tools look for."""

import os
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MIM_FILES = ('configs', 'tools', 'model-index.yml')


def requirements(name):
    """Return the requirements that requirements/<name>.txt lists."""
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    stripped = (line.split('#')[0].strip() for line in lines)
    return [line for line in stripped if line]


def version():
    """Return the version without importing the package, which needs torch."""
    text = (ROOT / 'ssn_plugin' / 'version.py').read_text()
    return re.search(r"__version__ = '(.+)'", text).group(1)


class BuildWithMim(build_py):
    """Puts configs, tools and model-index.yml into ssn_plugin/.mim.

    They are copied into the build folder for a wheel and linked for an editable install, so that
    the working tree never holds a second copy.
    """

    def run(self):
        super().run()
        target = (ROOT if self.editable_mode else Path(self.build_lib)) / 'ssn_plugin' / '.mim'
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in MIM_FILES:
            source = ROOT / name
            if self.editable_mode:
                (target / name).symlink_to(os.path.relpath(source, target))
            elif source.is_dir():
                caches = shutil.ignore_patterns('.*', '__pycache__')
                shutil.copytree(source, target / name, ignore=caches)
            else:
                shutil.copyfile(source, target / name)


# torch alone is required. The framework exists as two families of distributions, onedl-* and
# the original ones, with the same import names: to require one would make pip write it over the
# other. So it is asked for by extra, `det` and `seg` (onedl) or `original`, or is there already.
# mmcv compiles its ops only with torch in place and --no-build-isolation: `make setup` sees to it.
onedl = requirements('onedl')
extras = {
    'det': [line for line in onedl if not line.startswith('onedl-mmsegmentation')],
    'seg': [line for line in onedl if not line.startswith('onedl-mmdetection')],
    'original': requirements('original'),
    'triton': ['triton>=3.0; platform_system == "Linux"'],
    # The recipes of docs/without-mmengine.md, for which the tests need them.
    'lightning': ['lightning>=2.6'],
    'accelerate': ['accelerate>=1.0'],
    'deploy': requirements('deploy'),
    'openvino': ['openvino>=2024.6'],  # docs/deploy.md, as those two
    'demo': requirements('demo'),
    'docs': requirements('docs'),
    'test': requirements('demo') + requirements('deploy') + requirements('test'),
    'dev': requirements('dev'),
}
extras['all'] = sorted(
    {line for name in ('det', 'seg', 'test', 'docs', 'dev') for line in extras[name]}
)

setup(
    name='ssn_plugin',
    version=version(),
    description='Sparse Switchable Normalization as a norm layer for MMDetection, MMSegmentation '
    'and every other OpenMMLab 2 codebase',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    author='The ssn_plugin authors',
    license='Apache-2.0',
    license_files=['LICENSE'],
    packages=find_packages(include=['ssn_plugin', 'ssn_plugin.*']),
    package_data={'ssn_plugin': ['py.typed', '*/README.md', '*/templates/*']},
    python_requires='>=3.10',
    install_requires=['torch>=2.1'],
    extras_require=extras,
    cmdclass={'build_py': BuildWithMim},
    zip_safe=False,
    classifiers=[
        'Intended Audience :: Science/Research',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
