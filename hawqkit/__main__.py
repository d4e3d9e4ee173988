"""`python -m hawqkit`, and with several processes `torchrun -m hawqkit`."""

from hawqkit.cli import main

if __name__ == "__main__":
    main()
