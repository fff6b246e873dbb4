"""Commands: arguments, messages, exit codes, progress. Decides nothing about bytes or keys."""
