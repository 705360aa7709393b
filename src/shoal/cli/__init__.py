"""The command line: one file per command, and the files that commands read and write."""
