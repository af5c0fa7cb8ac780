"""``python -m schelix_scale`` and ``torchrun -m schelix_scale``: the command line."""

from schelix_scale.cli import main

if __name__ == "__main__":
    main()
