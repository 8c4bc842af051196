"""The commands: from a configuration to a `CommandResult`.

Each module imports its stage inside the function, so that `--help` loads no stage and training
loads neither SAM2 nor the code of stage one.
"""
