"""What each command does between reading the configuration and printing the answer.

A command's module imports its stage inside the function, so that `--help` loads none of them and
training loads neither SAM2 nor the code of stage one.
"""
