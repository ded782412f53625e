"""What may be asked for: frozen values, validated on construction."""
