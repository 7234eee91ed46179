"""Phantoms: procedural CT-like volumes with reports and questions, in the layouts of M3D."""
