"""What has to run: requests -> identity -> missing -> cost -> make; and everything that a value depends on."""
