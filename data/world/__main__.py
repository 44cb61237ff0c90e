"""Draw a scene of the built-in test split: `python -m data.world scene.png 7`."""

import sys

from data.world.drawing import draw
from data.world.scenes import make_scene


def main(argv: list[str]) -> None:
    if len(argv) not in (1, 2) or argv[0].startswith("-"):
        sys.exit("usage: python -m data.world FILE.png [INDEX]")
    path, index = argv[0], int(argv[1]) if len(argv) > 1 else 0
    draw(make_scene(0, "test", index)).save(path)
    print(f"scene {index} of the test split: {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
