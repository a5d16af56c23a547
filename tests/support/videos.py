"""Tiny videos in the layout of Kinetics: a square that moves to the right or to the left."""

from pathlib import Path

import cv2
import numpy as np


def make_videos(folder: Path, per_class: int = 6, frames: int = 20, size: int = 64) -> None:
    """Write videos_train and videos_val with their lists, of two classes."""
    random = np.random.default_rng(0)
    for split in ('train', 'val'):
        videos = folder / f'videos_{split}'
        videos.mkdir(parents=True)
        lines = []
        for index in range(2 * per_class):
            label = index % 2
            path = videos / f'{index}.mp4'
            writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'mp4v'), 10, (size, size))
            y = int(random.integers(0, size - 16))
            for moment in np.linspace(0, 1, frames):
                image = random.integers(0, 60, (size, size, 3), dtype=np.uint8)
                x = int((moment if label else 1 - moment) * (size - 16))
                image[y : y + 16, x : x + 16] = 255
                writer.write(image)
            writer.release()
            lines.append(f'{path.name} {label}\n')
        (folder / f'kinetics400_{split}_list_videos.txt').write_text(''.join(lines))
