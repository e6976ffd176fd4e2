"""Recipe, runner, stage folders, plan, report, and the functions of the Python API."""
