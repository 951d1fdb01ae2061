"""What fastsae is measured by. Nothing in fastsae imports it."""
