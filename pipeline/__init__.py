"""The conductor: command line, recipe, runner, store, plan and report."""
