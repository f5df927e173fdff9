"""What a person sees: the `dspex` command line. One module per cluster of commands; `main` finds them by name and turns
every error into one sentence and an exit code. Nothing heavy is imported before a command that needs it runs."""
