"""What every room stands on: errors, the stage contract, files. No torch."""
