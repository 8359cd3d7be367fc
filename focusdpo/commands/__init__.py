"""The command line: the table of commands, their parser, and one file a command."""
