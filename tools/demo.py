"""Train Mask R-CNN or DeepLabV3+ with SSN on the demo data, evaluate, and write pictures."""

import argparse
import sys
from pathlib import Path

from ssn_plugin.errors import InputError
from ssn_plugin.jobs.demo import run_demo


def main() -> None:
    """Parse, run, print what came out."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='example:\n  python tools/demo.py det --work-dir work_dirs/demo-det',
    )
    parser.add_argument('task', choices=('det', 'seg'), help='Mask R-CNN or DeepLabV3+')
    parser.add_argument('--work-dir', type=Path, help='default: work_dirs/demo-TASK')
    args = parser.parse_args()
    try:
        result = run_demo(args.task, args.work_dir or Path('work_dirs') / f'demo-{args.task}')
    except InputError as error:
        sys.exit(f'demo.py: {error}')

    decided = result.num_layers - len(result.undecided)
    print('\nOn held-out demo scenes:')
    for name, (value, least) in result.metrics.items():
        print(f'  {name}: {value:.3f} (a run that has learned reaches {least:g})')
    print(f'  SSN layers that are one normalizer: {decided} of {result.num_layers}')
    print(f'Checkpoint: {result.checkpoint}')
    print('Pictures:')
    for picture in result.pictures:
        print(f'  {picture.resolve()}')
    if not result.passed:
        sys.exit('demo.py: the run ended below what it should reach')


if __name__ == '__main__':
    main()
