"""What people look at: plots, pages, tables."""
