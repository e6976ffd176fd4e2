"""report.json and report.html, built from the stage folders."""
