# usage: kernel_symbols.sh NM ISA OBJECT...
# The objects of one instruction set offer no code that the linker could hand to another (a weak
# symbol outside their namespace), and need nothing but memory functions and each other: no libm,
# whose results change from one C library to the next.
nm=$1 isa=$2
shift 2
weak=$("$nm" -C "$@" | grep ' [uVvWw] ' | grep -v -e "torch_routers::$isa::" -e DW.ref.__gxx_personality)
needed=$("$nm" -C --undefined-only "$@" | grep ' U ' | grep -v -w -e memset -e memcpy -e memmove -e _GLOBAL_OFFSET_TABLE_)
[ -z "$weak$needed" ] && exit 0
printf 'weak symbols:\n%s\nneeded symbols:\n%s\n' "$weak" "$needed"
exit 1
