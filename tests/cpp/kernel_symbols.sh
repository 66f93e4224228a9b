# usage: kernel_symbols.sh NM ISA OBJECT...
# The objects of one instruction set offer no code that the linker could hand to another (a weak
# symbol outside their namespace), and need nothing but memory functions and each other: no libm,
# whose results change from one C library to the next.
nm=$1 isa=$2
shift 2
symbols=$("$nm" -C "$@") || exit 2
found=$(printf '%s\n' "$symbols" | grep -v -e "torch_routers::$isa::" -e DW.ref.__gxx_personality |
  sed -n -e 's/^.* [uVvWw] /weak: /p' -e 's/^.* U /needed: /p' |
  grep -v -x -E 'needed: (memset|memcpy|memmove|_GLOBAL_OFFSET_TABLE_)')
[ -z "$found" ] && exit 0
printf '%s\n' "$found"
exit 1
