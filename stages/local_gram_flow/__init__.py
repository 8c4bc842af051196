"""Pure maths of the Local Gram Flow: similarities, loss, fusion, alignment."""
