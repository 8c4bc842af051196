"""`python -m pipeline`, which is what torchrun and deepspeed launch."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
