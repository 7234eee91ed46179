"""Publishing, and what the installed package adds to transformers: registration, and the code beside what is saved."""
