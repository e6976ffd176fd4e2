"""The foundation of all other packages: errors, the stage contract, files. No torch."""
