"""One file for each subcommand: it parses, calls one library function and prints."""
