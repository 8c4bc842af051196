"""The subjects of a clip: tracked both ways, rated, fused, stored; `subject_extraction` leads."""
