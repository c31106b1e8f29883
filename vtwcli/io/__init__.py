"""What comes in and goes out: the terminal, files, documents, text that is fit to be shown."""
