"""What every export has, whatever its format: manifest, card, own code, and how it appears."""
