"""The flags that training scripts share, group by group: kohya's names, types, defaults and meanings."""
