"""`bayou bench ...`: what README claims, measured on this machine."""
