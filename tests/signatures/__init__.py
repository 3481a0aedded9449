"""What functions of optional packages take: records of their signatures, the script that makes them, their reader."""
