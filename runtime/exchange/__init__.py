"""How ranks reach each other, agree, and end together."""
