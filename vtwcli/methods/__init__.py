"""Published methods, one small file each, that only build schedules; the runtime knows nothing of them."""
