"""What a training would take: operations, memory of each kind, time; from configurations alone."""
