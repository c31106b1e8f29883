"""What the command runs on: processes, releases of libraries, memory."""
