"""What a run of stage one would take, from headers and shapes alone; `estimate` leads."""
