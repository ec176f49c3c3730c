"""Many devices: who lives, who gets the work, and how a message is never lost on its way."""
